"""Turns runs into tables and pictures."""
