"""Backbones of timm, open_clip, torchaudio and transformers."""
