"""Reading of clips: decoding, sampling of frames, order of clips, and collation into batches."""
