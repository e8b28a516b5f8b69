"""LightningModules of multimodal language models and their parts."""
