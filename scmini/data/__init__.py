"""Importers, the demo corpus, and the rules that choose negatives."""
