"""What a model can do, measured, with how sure that is."""
