"""Cleans documents: characters, blanks, remains of markup, boilerplate lines, personal data; and, if asked, augments them."""
