"""Any network under any split: tensor, pipeline, context and expert parallelism, ZeRO 0 to 3, one program
a stage."""
