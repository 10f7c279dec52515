"""What an image, a data set and a score are. Knows numpy and pydantic; no platform."""
