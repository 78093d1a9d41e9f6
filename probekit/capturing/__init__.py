"""Raw activations: captured once, measured as often as wanted."""
