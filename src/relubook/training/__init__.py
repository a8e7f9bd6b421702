"""Many networks trained side by side."""
