"""What turns a run into something to look at. None of it imports torch."""
