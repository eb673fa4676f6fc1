"""Other projects' interfaces, implemented with this library; each module imports the project it is for."""
