"""Scoring many texts behind one video: the video and its prompt are forwarded once."""
