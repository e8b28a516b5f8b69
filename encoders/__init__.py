"""Vision and audio encoders with sparse attention."""
