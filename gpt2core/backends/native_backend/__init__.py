"""GPT-2 in C, compiled with the user's own compiler when first used; needs no framework."""
