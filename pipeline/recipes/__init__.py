"""Recipes that ship: ``haloseg train --recipe NAME``; README.md says what each is for and what it reached."""
