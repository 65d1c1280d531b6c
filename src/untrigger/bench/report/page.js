"use strict";
// Draws the charts of the page in the colors of its light or dark scheme.
const figures = JSON.parse(document.getElementById("figures").textContent);

function scheme() {
  const style = getComputedStyle(document.documentElement);
  const [ink, line] = ["--ink", "--line"].map((name) => style.getPropertyValue(name).trim());
  const axis = { gridcolor: line, linecolor: line, tickcolor: line, showline: true };
  return {
    layout: {
      font: { color: ink, family: style.getPropertyValue("--font"), size: 13 },
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      hoverlabel: { font: { family: style.getPropertyValue("--font") } },
      xaxis: axis,
      yaxis: axis,
    },
  };
}

function draw() {
  const template = scheme();
  for (const box of document.querySelectorAll("[data-figure]")) {
    const { data, layout } = figures[box.dataset.figure];
    Plotly.react(box, data, { ...layout, template }, { displayModeBar: false, responsive: true });
  }
}

// Opens the section of a cell that a link points to.
function reveal() {
  const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  const section = target?.closest("details");
  if (section) {
    section.open = true;
    target.scrollIntoView();
  }
}

draw();
reveal();
for (const query of ["(prefers-color-scheme: dark)", "print"]) matchMedia(query).addEventListener("change", draw);
addEventListener("hashchange", reveal);
