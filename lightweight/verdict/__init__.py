"""What does a comparison of records say: how much faster, regressed, no worse? No torch here."""
