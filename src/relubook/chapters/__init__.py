"""What several cells of one chapter need. Nobody imports it."""
