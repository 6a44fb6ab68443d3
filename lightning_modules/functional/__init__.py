"""Pure tensor functions; nothing here imports anything but torch."""
