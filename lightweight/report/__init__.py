"""How are saved records read as tables, pictures and a page? No torch here."""
