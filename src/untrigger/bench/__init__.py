"""Many runs from one plan, their results on disk, and the report of them."""
