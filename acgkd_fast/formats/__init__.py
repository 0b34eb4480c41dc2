"""Other code bases' files, read without running what they hold and written atomically."""
