"""Draw a stand-in for the course's data set, in its folder layout, so that everything runs without.

    python scripts/make_demo_data.py demo_data                    # 2,400 and 630 frames, 5 tests
    python scripts/make_demo_data.py demo_data --with_test_truth  # and what to score a test with
    python scripts/make_demo_data.py tiny --train_frames 64 --sequence_frames 20

One person walks, turns, squats, lunges, bows and waves in one room; validation and test show
motions that are not in the training clips. The same options give the same images. A run that is
stopped leaves nothing behind.

How it works: a clip is a list of keyframes (where the body is, how low, where the arms point),
joined by straight lines and smoothed; legs follow by inverse kinematics; the joints in space go
through a camera and are drawn twice, as a clothed figure and as a skeleton. Lengths are in metres,
angles in radians.
"""

import functools
import json
import math
import os
import shutil
import signal
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from utils.cli import INTERRUPTED, Parser, UserError, number, progress, run

VERSION = 1  # raise it when the images change: a folder of another version is not taken for this
WIDTH, HEIGHT = 160, 80  # not a multiple of 64x32, so that resizing is exercised
FINE = 3  # images are drawn this many times larger and reduced, for smooth edges
TRAIN_CLIPS, TEST_SEQUENCES = 4, 5

# -------------------------------------------------------------------------------------------------
# Motion: keyframes, then joints in space

# What a keyframe can set. An arm is (forward, outward) for the upper arm, then for the forearm;
# 0, 0 hangs down.
REST = {"x": 0, "z": 0, "yaw": 0, "drop": 0, "lean": 0.03, "spread": 0.11, "split": 0, "wave": 0,
        "left": (0.02, 0.2, 0.2, 0.1), "right": (0.02, 0.2, 0.2, 0.1)}
PLACE = ("x", "z", "yaw")  # what lasts after a move; the rest of the body returns to REST
SPEED = 0.03  # metres a frame: a calm walk at 30 frames a second


def face(at, yaw):
    """Return keyframes that rotate the body to a direction, the short way round."""
    angle = (yaw - at["yaw"] + math.pi) % (2 * math.pi) - math.pi
    return [(int(8 + 9 * abs(angle)), {"yaw": at["yaw"] + angle})]


def go(at, x, z):
    """Return keyframes of a walk to (x, z): face it, then move at an even speed."""
    dx, dz = x - at["x"], z - at["z"]
    walk = (int(6 + math.hypot(dx, dz) / SPEED), {"x": x, "z": z})
    return face(at, math.atan2(dx, dz)) + [walk]


def cross(rng, at):
    """Walk to the other side of the room."""
    return go(at, -math.copysign(rng.uniform(0.6, 1.9), at["x"]), rng.uniform(-0.5, 0.4))


def approach(rng, at):
    """Walk towards the camera, stand a moment, and go back."""
    keys = go(at, at["x"] * 0.3, rng.uniform(0.9, 2.0)) + [(12, {})]
    here = at | keys[0][1] | keys[1][1]
    return keys + go(here, here["x"] + rng.uniform(-0.5, 0.5), rng.uniform(-0.4, 0.2))


def turn(rng, at):
    """Turn on the spot, once around or part of it."""
    angle = rng.choice([-1, 1]) * rng.uniform(2, 6.3)
    return [(int(22 * abs(angle)), {"yaw": at["yaw"] + angle}), (12, {})]


def squat(rng, at):
    """Squat once or twice with the arms stretched forward."""
    reach = rng.uniform(0.9, 1.5)
    arm = (reach, 0.1, reach, 0)
    low = {"drop": rng.uniform(0.3, 0.5), "lean": 0.5, "spread": 0.2, "left": arm, "right": arm}
    hold = int(rng.integers(6, 20))
    start = face(at, rng.uniform(-1.6, 1.6))
    return start + [(24, low), (hold, low), (24, {}), (6, {})] * int(rng.integers(1, 3))


def lunge(rng, at):
    """Step into a deep lunge, seen from the side or half from it."""
    arm = (0.4, 0.1, 1.0, 0)
    low = {"drop": rng.uniform(0.3, 0.42), "split": rng.choice([-1, 1]) * 0.42, "lean": 0.3,
           "left": arm, "right": arm}
    start = face(at, rng.choice([-1, 1]) * rng.uniform(0.9, 1.7))
    return start + [(26, low), (24, low), (26, {})]


def wave(rng, at):
    """Wave with one arm or with both."""
    up = (0.1, rng.uniform(1.3, 2.2), 0.2, rng.uniform(2.5, 3.0))
    pose = [{"right": up}, {"left": up}, {"left": up, "right": up}][rng.integers(3)]
    pose = pose | {"wave": rng.uniform(0.25, 0.5)}
    start = face(at, rng.uniform(-0.8, 0.8))
    return start + [(20, pose), (int(rng.integers(30, 60)), pose), (20, {})]


def raise_arms(rng, at):
    """Spread the arms, close them overhead, and lower them again."""
    out, over = (0, 1.5, 0, 1.6), (0, rng.uniform(2.0, 2.5), 0, 3.5)
    out, over = ({"left": arm, "right": arm, "spread": 0.18} for arm in (out, over))
    start = face(at, rng.uniform(-0.4, 0.4))
    return start + [(24, out), (24, over), (18, over), (24, out), (24, {})]


def gesture(rng, at):
    """Bring the hands together before the chest."""
    arm = (rng.uniform(0.1, 0.6), 0.25, rng.uniform(1.4, 2.2), -0.5)
    pose = {"left": arm, "right": arm}
    start = face(at, rng.uniform(-1, 1))
    return start + [(18, pose), (int(rng.integers(15, 35)), pose), (18, {})]


def bow(rng, at):
    """Bend forward at the hips."""
    arm = (0.3, 0.1, 0.3, 0)
    low = {"lean": rng.uniform(0.7, 1.1), "drop": 0.05, "left": arm, "right": arm}
    return face(at, rng.uniform(-1.8, 1.8)) + [(24, low), (14, low), (24, {})]


MOVES = (cross, approach, cross, turn, squat, lunge, wave, raise_arms, gesture, bow)


def keyframes(rng, n_frames):
    """Return the first n_frames of an endless performance.

    That is an array (n_frames,) for each name in REST, (n_frames, 4) for arms.
    """
    at = {"x": rng.uniform(-1.5, 1.5), "z": rng.uniform(-0.3, 0.3), "yaw": rng.uniform(-1, 1)}
    times, poses, moves = [0], [REST | at], []
    while times[-1] < n_frames + 50:  # beyond the end: a longer clip begins with the same frames
        if not moves:  # every move once before any comes again
            moves = [MOVES[i] for i in rng.permutation(len(MOVES))]
        for frames, goals in moves.pop()(rng, at):
            at |= {name: goals[name] for name in PLACE if name in goals}
            times.append(times[-1] + frames)
            poses.append(REST | at | goals)

    # half a second: rounds the corners of the straight lines
    soft = np.hanning(17)[1:-1] / np.hanning(17).sum()

    def smooth(values):
        line = np.interp(np.arange(n_frames + 7), times, values)
        return np.convolve(np.pad(line, (7, 0), mode="edge"), soft, "valid")

    found = {}
    for name, rest in REST.items():
        values = np.array([pose[name] for pose in poses], float).reshape(len(poses), -1)
        columns = np.stack([smooth(column) for column in values.T], -1)
        found[name] = columns.reshape((n_frames,) + np.shape(rest))
    return found


def local(left, up, forward):
    """Return vectors (T, 3) in the body's axes."""
    return np.stack(np.broadcast_arrays(left, up, forward), -1).astype(float)


def bend_knee(hip, ankle, outward, thigh=0.44, shin=0.43):
    """Return the knee between hip and ankle (T, 3), bent forward and a little outward.

    Axes: left, up, forward.
    """
    line = ankle - hip
    length = np.linalg.norm(line, axis=-1, keepdims=True).clip(0.1, thigh + shin - 1e-3)
    along = (thigh**2 - shin**2 + length**2) / (2 * length)
    bend = np.broadcast_to([0.25 * outward, 0.0, 1.0], hip.shape)
    line = line / np.linalg.norm(line, axis=-1, keepdims=True)
    bend = bend - (bend * line).sum(-1, keepdims=True) * line
    bend = bend / np.linalg.norm(bend, axis=-1, keepdims=True)
    return hip + along * line + np.sqrt((thigh**2 - along**2).clip(0)) * bend


def find_steps(rng, k, t):
    """Return (stride, phase, lift, sway) of a walk, each (T,).

    Steps follow the distance walked, so that feet don't slide; turning on the spot takes small
    steps too.
    """
    pace = np.hypot(np.gradient(k["x"]), np.gradient(k["z"]))
    walking = np.minimum(1, pace / SPEED)
    turning = np.minimum(1, np.abs(np.gradient(k["yaw"])) / 0.03)
    stride = 0.33 * walking
    advance = math.pi * pace / np.maximum(2 * stride, 0.05) + 0.12 * turning
    phase = rng.uniform(0, 6.28) + np.cumsum(advance)
    lift = 0.13 * walking + 0.05 * turning
    sway = 0.02 * np.sin(0.041 * t + rng.uniform(0, 6))
    return stride, phase, lift, sway + 0.012 * np.sin(0.113 * t + rng.uniform(0, 6))


def place_legs(k, stride, phase, lift, sway):
    """Return pelvis and legs: feet first, then the pelvis as high as they allow, then the knees."""
    ankles = {}
    for side, sign, offset in (("left", 1, 0), ("right", -1, math.pi)):
        a = phase + offset
        forward = stride * np.cos(a) + sign * k["split"] + 0.25 * k["drop"]
        up = 0.08 + lift * np.maximum(0, -np.sin(a)) + 0.12 * np.maximum(0, -sign * k["split"])
        ankles[side] = local(sign * k["spread"], up, forward)
    pelvis = 0.94 - k["drop"]
    for ankle in ankles.values():
        reach = np.sqrt(0.755 - ankle[:, 0] ** 2 - ankle[:, 2] ** 2)  # legs of 0.87 m
        pelvis = np.minimum(pelvis, ankle[:, 1] + reach)
    body = {"pelvis": local(sway, pelvis, 0)}
    for side, sign in (("left", 1), ("right", -1)):
        hip, ankle = local(sway + sign * 0.09, pelvis, 0), ankles[side]
        toe = ankle + local(sign * 0.03, 0.03 - 0.9 * (ankle[:, 1] - 0.05), 0.17)
        knee = bend_knee(hip, ankle, sign)
        body |= {side + "_hip": hip, side + "_ankle": ankle, side + "_toe": toe,
                 side + "_knee": knee}
    return body


def bone(sign, length, forward, outward):
    """Return the vector (T, 3) of a bone of the left (1) or right (-1) arm from its angles (T,)."""
    down = np.cos(outward)
    return length * local(sign * np.sin(outward), -down * np.cos(forward), down * np.sin(forward))


def place_trunk(rng, k, t, pelvis, stride, phase, sway):
    """Return head and arms: the trunk leans about the hips; shoulders twist against the legs."""
    lean = k["lean"] + 0.08 * stride + 0.015 * np.sin(0.09 * t)
    twist = 0.5 * stride * np.cos(phase)

    def trunk(left, up, forward=0.0):
        sin, cos = np.sin(lean), np.cos(lean)
        return pelvis + local(left + up * sway, up * cos - forward * sin, up * sin + forward * cos)

    body = {"neck": trunk(0, 0.55), "nose": trunk(0, 0.67, 0.13),
            "head": trunk(0, 0.70, 0.03) + local(0, 0, -0.04 * np.sin(lean))}
    for side, sign, offset in (("left", 1, math.pi), ("right", -1, 0)):
        body[side + "_eye"] = trunk(sign * 0.035, 0.71, 0.1)
        body[side + "_ear"] = trunk(sign * 0.075, 0.69, 0.02)
        shoulder = trunk(sign * 0.185 * np.cos(twist), 0.49, -sign * 0.185 * np.sin(twist))
        arm = k[side] + 0.03 * np.sin(0.07 * t[:, None] + rng.uniform(0, 6, 4))
        swing = 1.5 * stride * np.cos(phase + offset)
        beat = k["wave"] * np.sin(0.3 * t + (0 if sign > 0 else 0.7)) * (arm[:, 3] > 0.5)

        elbow = shoulder + bone(sign, 0.29, arm[:, 0] + swing, arm[:, 1])
        wrist = elbow + bone(sign, 0.26, arm[:, 2] + 1.2 * swing, arm[:, 3] + beat)
        hand = wrist + bone(sign, 0.1, arm[:, 2] + 1.2 * swing, arm[:, 3] + 1.2 * beat)
        body |= {side + "_shoulder": shoulder, side + "_elbow": elbow, side + "_wrist": wrist,
                 side + "_hand": hand}
    return body


@functools.lru_cache(maxsize=2)
def perform(clip, n_frames):
    """Return the joints of one clip in space: a dict of arrays (T, 3) in metres.

    Axes: x to the right, y up, z towards the camera.
    """
    rng = np.random.default_rng([2024, clip])
    k = keyframes(rng, n_frames)
    t = np.arange(n_frames)
    stride, phase, lift, sway = find_steps(rng, k, t)
    body = place_legs(k, stride, phase, lift, sway)
    body |= place_trunk(rng, k, t, body["pelvis"], stride, phase, sway)

    # From the body's axes to the room's.
    sin, cos = np.sin(k["yaw"]), np.cos(k["yaw"])
    room = {}
    for name, p in body.items():
        x, z = k["x"] + p[:, 0] * cos + p[:, 2] * sin, k["z"] - p[:, 0] * sin + p[:, 2] * cos
        room[name] = np.stack([x, p[:, 1], z], -1)
    room["ground"] = local(k["x"], 0.0, k["z"])
    return room


# -------------------------------------------------------------------------------------------------
# Images: a camera, a room, a clothed figure, a skeleton

CAMERA_HEIGHT, CAMERA_DISTANCE, HORIZON = 0.95, 6.0, 0.415
SHIRT, SHIRT_LIGHT, PLACKET = (47, 60, 84), (62, 77, 102), (126, 134, 146)
TROUSERS, TROUSERS_LIGHT, SHOES = (20, 23, 27), (31, 34, 39), (15, 15, 18)
SKIN, HAIR = (128, 88, 74), (24, 20, 20)


class View:
    """See one moment with the camera: `view[name]` is a joint's (x, y) in the enlarged image."""

    def __init__(self, joints):
        self.joints = joints

    def scale(self, name):
        """Return the pixels of the enlarged image for a metre at this joint."""
        return FINE * WIDTH * 0.209 * CAMERA_DISTANCE / (CAMERA_DISTANCE - self.joints[name][2])

    def __getitem__(self, name):
        x, y, _ = self.joints[name]
        s = self.scale(name)
        down = FINE * HEIGHT * HORIZON + s * (CAMERA_HEIGHT - y)
        return np.array([FINE * WIDTH / 2 + s * x, down])

    def depth(self, *names):
        return sum(self.joints[name][2] for name in names) / len(names)


@functools.lru_cache(maxsize=1)
def backdrop():
    """Draw the empty room: a grey wall under three lamps, dark between, and a paler floor."""
    v, u = np.mgrid[0:HEIGHT, 0:WIDTH] + 0.5
    u, v = u / WIDTH, v / HEIGHT

    def glow(at_u, at_v, wide, high):
        return np.exp(-(((u - at_u) / wide) ** 2 + ((v - at_v) / high) ** 2))

    light = 0.62 + 0.07 * (u - 0.5)
    light = light + 0.06 * glow(0.65, 1.0, 0.7, 0.4) - 0.06 * glow(0.1, 0.45, 0.5, 0.25)
    lamps = 0.24 * (glow(0.05, -0.05, 0.08, 0.4) + glow(0.46, -0.05, 0.08, 0.4))
    light += lamps + 0.28 * glow(0.9, -0.05, 0.13, 0.5)
    light -= 0.21 * (glow(0.25, -0.05, 0.11, 0.3) + glow(0.66, -0.05, 0.1, 0.26))
    light += 0.035 / (1 + np.exp(-(v - 0.82) * 90))  # the line where wall and floor meet
    light -= 0.10 * ((u - 0.5) ** 2 + 0.4 * (v - 0.5) ** 2)  # vignetting
    rgb = light[..., None] * np.array([1.008, 1.0, 0.986])
    return Image.fromarray((255 * rgb.clip(0, 1)).round().astype(np.uint8))


def limb(draw, p, q, radius_p, radius_q, colour):
    """Draw a tapered tube with round ends."""
    across = np.array([p[1] - q[1], q[0] - p[0]]) / max(np.hypot(*(q - p)), 1e-6)
    corners = (p + across * radius_p, q + across * radius_q,
               q - across * radius_q, p - across * radius_p)
    draw.polygon([tuple(corner) for corner in corners], fill=colour)
    for (x, y), r in ((p, radius_p), (q, radius_q)):
        draw.ellipse((x - r, y - r, x + r, y + r), fill=colour)


def shadowed_room(view):
    """Draw the room with a soft shadow around the feet and their faint mirror image below."""
    shade = Image.new("L", (WIDTH, HEIGHT))
    draw = ImageDraw.Draw(shade)
    (x, y), s = view["ground"] / FINE, view.scale("ground") / FINE
    draw.ellipse((x - 0.45 * s, y - 0.1 * s, x + 0.45 * s, y + 0.06 * s), fill=42)
    for side in ("left", "right"):
        fx, fy = (view[side + "_ankle"] + view[side + "_toe"]) / 2 / FINE
        draw.rectangle((fx - 0.07 * s, y, fx + 0.07 * s, y + 0.3 * s), fill=34)
        near = max(0.0, 1 - (y - fy) / (0.3 * s))  # fades as the foot leaves the floor
        around = (fx - 0.14 * s, y - 0.04 * s, fx + 0.14 * s, y + 0.05 * s)
        draw.ellipse(around, fill=int(110 * min(near, 1)))
    dark = Image.new("RGB", (WIDTH, HEIGHT), (40, 40, 42))
    return Image.composite(dark, backdrop(), shade.filter(ImageFilter.GaussianBlur(1.6)))


def draw_leg(draw, view, s, side):
    hip, knee, ankle, toe = (view[f"{side}_{joint}"] for joint in ("hip", "knee", "ankle", "toe"))
    limb(draw, ankle + (0, 0.03 * s), toe, 0.055 * s, 0.04 * s, SHOES)
    limb(draw, knee, ankle, 0.075 * s, 0.058 * s, TROUSERS)
    limb(draw, hip, knee, 0.1 * s, 0.078 * s, TROUSERS)
    lit = hip + (0.03 * s, 0), knee + (0.025 * s, 0)  # from the right
    limb(draw, *lit, 0.035 * s, 0.02 * s, TROUSERS_LIGHT)


def draw_arm(draw, view, s, side):
    joints = ("shoulder", "elbow", "wrist", "hand")
    shoulder, elbow, wrist, hand = (view[f"{side}_{joint}"] for joint in joints)
    limb(draw, wrist, hand, 0.04 * s, 0.045 * s, SKIN)
    limb(draw, elbow, wrist, 0.055 * s, 0.045 * s, SHIRT)
    limb(draw, shoulder, elbow, 0.066 * s, 0.056 * s, SHIRT)
    lit = shoulder + (0.02 * s, 0), elbow + (0.02 * s, 0)
    limb(draw, *lit, 0.03 * s, 0.02 * s, SHIRT_LIGHT)


def draw_trunk(draw, view, s, cos, sin):
    pelvis, neck = view["pelvis"], view["neck"]
    up = neck - pelvis
    across = np.array([-up[1], up[0]]) / max(np.hypot(*up), 1e-6) * s

    def slab(rows, colour, aside=0.0):
        """Draw a band along the trunk, from rows of (place along it, half width, half depth)."""
        left, right = [], []
        for place, width, depth in rows:
            centre = pelvis + up * place + across * aside
            half = across * math.hypot(width * cos, depth * sin)
            left.append(tuple(centre + half))
            right.append(tuple(centre - half))
        draw.polygon(left + right[::-1], fill=colour)

    slab([(-0.18, 0.13, 0.09), (0, 0.165, 0.12), (0.15, 0.15, 0.11)], TROUSERS)
    slab([(0.06, 0.16, 0.12), (0.3, 0.15, 0.115), (0.7, 0.185, 0.125),
          (0.9, 0.19, 0.1), (0.98, 0.14, 0.08), (1.04, 0.06, 0.05)], SHIRT)
    slab([(0.12, 0.05, 0.035), (0.7, 0.06, 0.04), (0.9, 0.05, 0.03)], SHIRT_LIGHT, aside=0.07)
    if cos > 0.1:  # the front of the shirt shows which way the person looks
        slab([(0.1, 0.018, 0), (0.95, 0.022, 0)], PLACKET, aside=0.1 * sin)


def draw_head(draw, view, s, cos, sin):
    x, y = view["head"]
    limb(draw, view["neck"], view["head"], 0.052 * s, 0.05 * s, SKIN)
    draw.ellipse((x - 0.09 * s, y - 0.12 * s, x + 0.09 * s, y + 0.1 * s), fill=HAIR)
    if cos > -0.35:  # from behind there is only hair
        fx, half = x + 0.045 * sin * s, (0.045 + 0.027 * max(cos, 0)) * s
        draw.ellipse((fx - half, y - 0.05 * s, fx + half, y + 0.115 * s), fill=SKIN)


def draw_frame(joints):
    """Draw what the camera records: the clothed figure in the room, (WIDTH, HEIGHT)."""
    view = View(joints)
    layer = Image.new("RGBA", (FINE * WIDTH, FINE * HEIGHT))
    draw = ImageDraw.Draw(layer)
    s = view.scale("pelvis")
    hips = joints["left_hip"] - joints["right_hip"]
    # of yaw: sin > 0 looks to the right, cos > 0 at us
    cos, sin = hips[[0, 2]] / np.hypot(hips[0], hips[2]) * (1, -1)

    parts = [(view.depth("pelvis", "neck"), draw_trunk, (cos, sin)),
             (view.depth("head", "neck") + 0.02, draw_head, (cos, sin))]
    for side in ("left", "right"):
        depth = view.depth(side + "_hip", side + "_knee") - 0.02
        parts.append((depth, draw_leg, (side,)))
        depth = view.depth(side + "_shoulder", side + "_elbow", side + "_wrist")
        parts.append((depth, draw_arm, (side,)))
    for _, draw_part, how in sorted(parts, key=lambda part: part[0]):  # the far ones first
        draw_part(draw, view, s, *how)

    room = shadowed_room(view).convert("RGBA")
    room.alpha_composite(layer.reduce(FINE))
    return room.convert("RGB")


BONES = (  # OpenPose's tree, in colours like those of the course's pose images
    ("pelvis", "neck", (0, 0, 255)), ("neck", "nose", (30, 20, 255)),
    ("pelvis", "left_hip", (60, 30, 220)), ("pelvis", "right_hip", (20, 60, 255)),
    ("neck", "left_shoulder", (40, 60, 255)), ("neck", "right_shoulder", (60, 60, 255)),
    ("right_shoulder", "right_elbow", (0, 85, 255)), ("right_elbow", "right_wrist", (0, 125, 255)),
    ("left_shoulder", "left_elbow", (0, 200, 255)), ("left_elbow", "left_wrist", (0, 240, 255)),
    ("right_wrist", "right_hand", (120, 110, 120)), ("left_wrist", "left_hand", (120, 120, 110)),
    ("right_hip", "right_knee", (0, 255, 150)), ("right_knee", "right_ankle", (0, 255, 85)),
    ("right_ankle", "right_toe", (0, 255, 0)),
    ("left_hip", "left_knee", (190, 45, 45)), ("left_knee", "left_ankle", (255, 85, 0)),
    ("left_ankle", "left_toe", (255, 190, 0)),
    ("nose", "right_eye", (170, 0, 170)), ("right_eye", "right_ear", (150, 0, 255)),
    ("nose", "left_eye", (255, 0, 170)), ("left_eye", "left_ear", (200, 0, 120)),
)


def draw_pose(joints):
    """Draw the pose of the same moment: a thin coloured skeleton on white, (WIDTH, HEIGHT)."""
    view = View(joints)
    image = Image.new("RGB", (FINE * WIDTH, FINE * HEIGHT), "white")
    draw = ImageDraw.Draw(image)
    for a, b, colour in BONES:
        draw.line([tuple(view[a]), tuple(view[b])], fill=colour, width=2)
    return image.reduce(FINE)


# -------------------------------------------------------------------------------------------------
# The folder


def plan(args):
    """Return every image of the set, in order.

    An image is (path below OUT, which drawing, clip, frames of the clip, frame).
    """
    images = []
    cuts = [args.train_frames * i // TRAIN_CLIPS for i in range(TRAIN_CLIPS + 1)]
    for clip in range(TRAIN_CLIPS):
        for i in range(cuts[clip], cuts[clip + 1]):
            moment = (clip, cuts[clip + 1] - cuts[clip], i - cuts[clip])
            images.append((f"train/train_img/{i}.png", draw_frame, *moment))
            images.append((f"train/train_label/{i}.png", draw_pose, *moment))
    for t in range(args.sequence_frames):
        moment = (TRAIN_CLIPS, args.sequence_frames, t)
        images.append((f"val/val_img/{t}.png", draw_frame, *moment))
        images.append((f"val/val_label/{t}.png", draw_pose, *moment))
    for sequence in range(TEST_SEQUENCES):
        for t in range(args.sequence_frames):
            moment = (TRAIN_CLIPS + 1 + sequence, args.sequence_frames, t)
            images.append((f"test/test_label/{sequence}/{t}.png", draw_pose, *moment))
            if t == 0:
                images.append((f"test/test_img/{sequence}/0.png", draw_frame, *moment))
            if args.with_test_truth:
                images.append((f"test_truth/{sequence}/{t}.png", draw_frame, *moment))
    return images


def draw_one(folder, image):
    name, drawing, clip, n_frames, t = image
    joints = perform(clip, n_frames)
    drawing({joint: positions[t] for joint, positions in joints.items()}).save(folder / name)


def quiet_worker():
    """Leave Ctrl-C to the parent; a worker that answers too prints a traceback."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def draw_all(folder, images):
    """Draw the planned images below `folder`, in as many processes as there are cores."""
    for parent in sorted({(folder / name).parent for name, *_ in images}):
        parent.mkdir(parents=True)
    pool = ProcessPoolExecutor(min(os.cpu_count() or 1, 8), initializer=quiet_worker)
    try:
        drawn = pool.map(functools.partial(draw_one, folder), images, chunksize=16)
        for _ in progress(drawn, total=len(images), desc="drawing", unit="image"):
            pass
    finally:
        pool.shutdown(cancel_futures=True)


def build_parser():
    parser = Parser(description="Draw a stand-in for the course's data set, in its folder layout.")
    parser.add_argument("out", metavar="OUT", type=Path,
                        help="folder to make, for --DR; must be new or empty, "
                             "or hold this set already")
    parser.add_argument("--train_frames", type=number(int, 16, 100_000), default=2400,
                        help=f"training frames, in {TRAIN_CLIPS} clips")
    parser.add_argument("--sequence_frames", type=number(int, 2, 10_000), default=630,
                        help="frames of the validation sequence and of each test sequence")
    parser.add_argument("--with_test_truth", action="store_true",
                        help="also write the frames of the test sequences, "
                             "to OUT/test_truth/{0..4}/*.png")
    return parser


def main():
    args = build_parser().parse_args()
    # so that the clean-up below runs
    for ending in INTERRUPTED.keys() - {signal.SIGINT}:
        if signal.getsignal(ending) is not signal.SIG_IGN:  # nohup has SIGHUP ignored
            signal.signal(ending, lambda received, _: sys.exit(INTERRUPTED[received]))

    out = args.out.resolve()
    if not out.name:
        raise UserError(f"{args.out}: is the root of the file system; expected a folder of its own")
    images = plan(args)
    # beside OUT, so that one rename at the end puts it in place
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    options = {name: value for name, value in vars(args).items() if name != "out"}
    card = json.dumps(options | {"version": VERSION}).encode()  # kept in the folder: what drew it
    try:
        if out.exists() and not out.is_dir():
            raise UserError(f"{args.out}: expected a folder to draw into, found a file")
        if out.exists() and any(out.iterdir()):
            same = (out / "demo.json").is_file() and (out / "demo.json").read_bytes() == card
            if same and all((out / name).is_file() for name, *_ in images):
                print(f"{args.out} already holds this demo set ({len(images):,} images): "
                      "nothing to do")
                return 0
            raise UserError(f"{args.out}: expected a new or empty folder, "
                            "or the complete demo set of these options")
        try:
            part.mkdir(parents=True)
            draw_all(part, images)
            (part / "demo.json").write_bytes(card)
            if out.exists():
                out.rmdir()
            part.rename(out)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    except OSError as error:
        raise UserError(f"{args.out}: cannot write there: {error.strerror or error}") from error
    print(f"{args.out}: {args.train_frames:,} training frames, {args.sequence_frames} to validate, "
          f"{TEST_SEQUENCES} test sequences of {args.sequence_frames} poses")


if __name__ == "__main__":
    run(main)
