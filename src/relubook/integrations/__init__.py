"""Watch units inside of trainers, and send the numbers to where the others of a run are."""
