"""`ppg-fast rate`: people rate dialogues, of a file or of a run while it trains, in a browser or in the terminal."""
