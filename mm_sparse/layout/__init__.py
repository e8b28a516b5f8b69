"""What each token is, what it may see, and how rows are cut into tiles and units."""
