"""What authors run: execute the notebooks, emulate Colab, set the repository's address."""
