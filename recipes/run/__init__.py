"""Programs that train and inspect."""
