"""The group reduce: a butterfly in which every member owns a slice and all end with identical bits."""
