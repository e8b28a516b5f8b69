"""Data sets that are made or packed here."""
