"""What several backends use: ragged batches, memory, threads, the C compiler."""
