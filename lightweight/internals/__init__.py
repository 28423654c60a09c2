"""What is private or patched in the libraries that this rests on? One module a library."""
