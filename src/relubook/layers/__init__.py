"""The rectifier and its family, initializers and Maxout. Needs torch alone."""
