"""Accuracy tables: every kernel and every mutation on the same questions, compared in pairs with the reference."""
