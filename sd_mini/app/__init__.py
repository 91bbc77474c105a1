"""The page: `sd-mini app RUN`. `server.serve` is its door; gradio is imported by its modules alone."""
