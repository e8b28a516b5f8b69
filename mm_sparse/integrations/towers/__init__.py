"""Attention layers of timm, open_clip and torchaudio."""
