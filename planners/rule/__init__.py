"""The fixed rule behind `plan="auto"`: what it is asked, and how it chooses."""
