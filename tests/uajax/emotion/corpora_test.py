"""Corpora: names of their files, CSVs, and splits that keep speakers apart."""

import pathlib

import numpy as np
import pytest

from uajax import media
from uajax.emotion import corpora
from uajax.errors import UserError


@pytest.fixture
def corpus(tmp_path):
  """`corpus("a/b.wav", ...)` is a folder with such files, a moment of sound in each."""

  def make(*names):
    for name in names:
      path = tmp_path / "corpus" / name
      path.parent.mkdir(parents=True, exist_ok=True)
      if path.suffix == ".wav":
        media.write_wav(path, np.zeros(1600, np.float32))
      else:
        path.touch()
    return tmp_path / "corpus"

  return make


def told(utterances):
  return [(u.path.name, u.speaker, u.label, round(u.intensity, 2)) for u in utterances]


def test_emodb(corpus):
  folder = corpus("wav/03a01Fa.wav", "wav/16b10Wb.wav", "wav/08a02Na.wav", "wav/._08a02Na.wav",
                  "readme.wav")  # fmt: skip
  assert told(corpora.read(folder)) == [
    ("03a01Fa.wav", "03", "happy", 1),
    ("08a02Na.wav", "08", "neutral", 0),
    ("16b10Wb.wav", "16", "angry", 1),
  ]
  assert corpora.read(folder)[2].text == "b10"


def test_ravdess_without_songs_pictures_and_doubles(corpus):
  found = corpora.read(corpus(
    "Actor_12/03-01-06-01-02-01-12.wav", "Actor_12/03-01-02-02-02-01-12.wav",
    "Actor_12/03-02-06-01-02-01-12.wav",  # sung
    "Actor_12/02-01-06-01-02-01-12.mp4",  # silent
    "Actor_12/01-01-06-01-02-01-12.mp4",  # the first one, filmed
    "Actor_13/03-01-01-01-01-01-13.wav",
  ))  # fmt: skip
  assert told(found) == [
    ("03-01-02-02-02-01-12.wav", "12", "calm", 1),
    ("03-01-06-01-02-01-12.wav", "12", "fear", 0.67),
    ("03-01-01-01-01-01-13.wav", "13", "neutral", 0),
  ]


def test_crema(corpus):
  found = corpora.read(corpus("1001_DFA_ANG_XX.wav", "1001_IEO_HAP_LO.wav", "1002_IEO_DIS_MD.wav"))
  assert told(found) == [
    ("1001_DFA_ANG_XX.wav", "1001", "angry", 1),
    ("1001_IEO_HAP_LO.wav", "1001", "happy", 0.33),
    ("1002_IEO_DIS_MD.wav", "1002", "disgusted", 0.67),
  ]


def test_mead_by_sound_or_the_frontal_video(corpus):
  folder = corpus(
    "M003/audio/angry/level_1/001.m4a", "M003/video/front/angry/level_1/001.mp4",
    "M003/video/left_30/angry/level_1/001.mp4", "W009/video/front/contempt/level_3/002.mp4",
  )  # fmt: skip
  expected = [("001.m4a", "M003", "angry", 0.33), ("002.mp4", "W009", "contempt", 1)]
  assert told(corpora.read(folder)) == expected
  assert told(corpora.read(folder / "M003")) == expected[:1]  # one speaker's folder


def test_csv(corpus):
  folder = corpus("a/1.wav", "a/2.wav")
  table = folder / "speech.csv"
  table.write_text("Path, label,intensity,speaker\na/1.wav,Anger,0.4,kim\n\na/2.wav,smug,,lee\n")
  assert told(corpora.read(table)) == [("1.wav", "kim", "angry", 0.4), ("2.wav", "lee", "smug", 1)]


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("", "has the columns none"),
    ("file,label\n1.wav,sad\n", "has the columns file, label"),
    ("path,label\n", "names no recordings"),
    ("path,label\n1.wav\n", "row 2 has 1 values for 2 columns"),
    ("path,label\n1.wav,sad,x\n", "row 2 has 3 values for 2 columns"),
    ("path,label\n1.wav,\n", "row 2: the label is empty"),
    ("path,label\n1.wav,a/b\n", "row 2: label 'a/b'"),
    ("path,label\n1.wav,sad\n2.wav,sad\n", "row 3: .*2.wav is not there"),
    ("path,label,intensity\n1.wav,sad,1.5\n", "row 2: intensity '1.5'"),
    ("path,label,intensity\n1.wav,sad,nan\n", "row 2: intensity 'nan'"),
  ],
)
def test_wrong_csv(corpus, text, message):
  table = corpus("1.wav") / "speech.csv"
  table.write_text(text)
  with pytest.raises(UserError, match=message) as caught:
    corpora.read(table)
  assert "\n" not in str(caught.value)


def test_what_is_no_corpus(corpus, tmp_path):
  with pytest.raises(UserError, match="does not exist"):
    corpora.read(tmp_path / "nowhere")
  (tmp_path / "empty").mkdir()
  with pytest.raises(UserError, match="holds no recordings"):
    corpora.read(tmp_path / "empty")
  folder = corpus("talk.wav")
  with pytest.raises(UserError, match="EmoDB, RAVDESS, CREMA-D and MEAD .*talk.wav"):
    corpora.read(folder)
  with pytest.raises(UserError, match="neither a folder nor a .csv"):
    corpora.read(folder / "talk.wav")


def utterances(**counts):
  return [
    corpora.Utterance(pathlib.Path(f"{who}{i}.wav"), who, "sad", 1.0, "")
    for who, n in counts.items()
    for i in range(n)
  ]


@pytest.mark.parametrize(("groups", "judge"), [(None, True), (3, True), (2, False)])
def test_no_speaker_is_on_two_sides(groups, judge):
  material = utterances(ann=5, bob=3, cid=4, dan=1)
  made = corpora.splits(material, groups, judge=judge)
  assert len(made) == (groups or 4)
  assert sorted(np.concatenate([s.test for s in made])) == list(range(13))  # each tested once
  for split in made:
    sides = [{material[i].speaker for i in rows} for rows in (split.learn, split.judge, split.test)]
    assert sum(len(rows) for rows in split[1:]) == 13
    assert set(split.held_out) == sides[2] and bool(sides[1]) == judge
    assert not (sides[0] & sides[1] or sides[0] & sides[2] or sides[1] & sides[2])


def test_groups_are_of_like_size():
  made = corpora.splits(utterances(a=10, b=1, c=9, d=2), 2, judge=False)
  assert sorted(len(s.test) for s in made) == [11, 11]


def test_too_few_or_unknown_speakers():
  with pytest.raises(UserError, match="2 speakers cannot be held out in 2 groups: .*at least 3"):
    corpora.splits(utterances(a=1, b=1))
  with pytest.raises(UserError, match="in 5 groups"):
    corpora.splits(utterances(a=1, b=1, c=1), 5)
  with pytest.raises(UserError, match="column speaker"):
    corpora.splits([*utterances(a=1, b=1), *utterances(**{"": 1})], judge=False)
