"""What authors run: execute the notebooks, emulate Colab, print the book, set the repository's address."""
