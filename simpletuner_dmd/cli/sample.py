"""`simpletuner sample`: renders prompts with the student of a checkpoint, by the sampler it was trained for."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from simpletuner_dmd.cli.common import add_run_arguments

    add_run_arguments(parser)
    parser.add_argument("--prompt", action="append", required=True, help="what the video shows; may be given again")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--size", metavar="WxH", help="default: the run's validation_resolution")
    parser.add_argument("--frames", type=int, help="default: the run's validation_num_video_frames")
    parser.add_argument("--teacher", action="store_true", help="also the teacher, by its own many steps")
    parser.add_argument("--out", type=Path, help="folder for the videos; default: RUN/samples")


def run(args: argparse.Namespace) -> int:
    """Writes one mp4 per prompt and prints its path."""
    from accelerate import Accelerator
    from torch import cuda

    from simpletuner_dmd.cli.assemble import Assembly
    from simpletuner_dmd.cli.common import quiet_libraries
    from simpletuner_dmd.cli.other_expert import whole_student, whole_teacher
    from simpletuner_dmd.cli.saved import SavedStudent, open_checkpoint, open_run
    from simpletuner_dmd.config import UserError, frames_4n1
    from simpletuner_dmd.config.coerce import frame_size
    from simpletuner_dmd.validation.render import Renderer

    quiet_libraries()
    folder = Path(args.run)
    loaded = open_run(folder)
    state = open_checkpoint(folder, args.checkpoint)
    config = loaded.config
    if args.size:
        try:
            config.validation_resolution = [frame_size(args.size)]
        except ValueError as error:
            raise UserError(f"--size {args.size}: {error}", fix="write WIDTHxHEIGHT, for example 832x480") from error
    frames = [frames_4n1(args.frames)] if args.frames else config.validation_num_video_frames[:1]
    config.validation_num_video_frames = frames
    config.validation_seed, config.num_validation_images = args.seed, 1
    loaded.validation_prompts = {f"{index:02d}-{prompt[:40]}": prompt for index, prompt in enumerate(args.prompt)}
    assembly = Assembly(loaded, Accelerator(cpu=not cuda.is_available()).device)
    embeddings = assembly.embed([*args.prompt, assembly.negative_prompt])
    scenes = assembly.scenes(embeddings.__getitem__)
    negative = embeddings[assembly.negative_prompt]
    out = args.out or folder / "samples"
    renderer = Renderer(out, scenes, negative, assembly.codec.decode, config.framerate, assembly.device)
    saved = SavedStudent(assembly, state, raw=args.raw)
    roles = saved.roles
    with saved.best() as averaged, roles.evaluating():
        kind = "student-ema" if averaged else "student"
        with whole_student(assembly, roles, assembly.student_sampler) as (student, sampler):
            made = renderer.render(student, sampler, kind, state.step)
        if args.teacher:
            with whole_teacher(assembly, roles.teacher) as teacher:
                made.merge(renderer.render(teacher, assembly.teacher_sampler, "teacher", state.step))
    for row in made.rows:
        print(out / row["file"])
    if made.failures:
        raise RuntimeError("; ".join(made.failures))
    return 0
