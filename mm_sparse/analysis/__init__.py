"""What layers kept: reports, heat maps, pictures, an HTML page."""
