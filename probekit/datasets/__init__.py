"""Built-in datasets, registered through the public hooks like any pack's."""
