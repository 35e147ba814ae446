"""The demo: our own seed pairs and documents, the three corpora's layouts with their dirt, and tiny models that fit two cores."""
