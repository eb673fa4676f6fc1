int lanes(void) { return 1; }
