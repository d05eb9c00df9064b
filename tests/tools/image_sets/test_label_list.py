from dataclasses import replace

import numpy as np
import pytest

from ressl.batch import DataError
from tools.image_sets.label_list import LabelList, find_listed, number_labels, parse_label_list
from tools.image_sets.tree import Listing

LISTED = LabelList("labels", ("d/a.jpg", "b c.png"), ("dog", "cat"))


def parse(text, knows=lambda name: False):
    return parse_label_list("labels", text, knows)


@pytest.mark.parametrize(
    "text",
    [
        "d/a.jpg,dog\nb c.png,cat\n",
        "d/a.jpg\tdog\r\nb c.png\tcat",
        "./d/a.jpg dog\n\n/b c.png   cat\n",
        "path,label\nd/a.jpg,dog\nb c.png,cat\n",
        "file label\nd/a.jpg dog\nb c.png cat\n",
        "split,Label,Filename\ntrain,dog,d/a.jpg\nval,cat,b c.png\n",
        "d/a.jpg;dog\nb c.png;cat\n",
        "dog,d/a.jpg\ncat,b c.png\n",
        "id,filename,label\n1,d/a.jpg,dog\n2,b c.png,cat\n",
        "name,photo,class\nx,d/a.jpg,dog\ny,b c.png,cat\n",
        '"d/a.jpg","dog"\n"b c.png",cat\n',
        "d/a.jpg\tdog\t0\t0\t64\t64\nb c.png\tcat\t1\t1\t62\t62\n",
        "ImageId,PredictionString\nd/a.jpg,dog 1 2 3 4 dog 5 6 7 8\nb c.png,cat 0 0 9 9 \n",
    ],
)
def test_lists_of_many_kinds_say_the_same(text):
    assert parse(text) == LISTED


def test_a_header_is_known_by_names_that_have_no_suffix():
    listed = parse("what,this is\nd/a,dog\nb c,cat\n", {"d/a", "b c"}.__contains__)
    assert listed.paths == ("d/a", "b c")
    assert parse("d/a,dog\nb c,cat\n", {"d/a", "b c"}.__contains__) == replace(listed, notes=())


def test_a_header_that_is_known_by_no_word_is_told():
    listed = parse("what,this is\nd/a.jpg,dog\nb c.png,cat\n")
    assert listed.notes == ("labels: its first line is taken for a header: what,this is",)
    assert replace(listed, notes=()) == LISTED


def test_a_first_image_that_is_missing_is_no_header():
    assert parse("missing,dog\na.jpg,cat\nb.jpg,dog\n").paths == ("missing", "a.jpg", "b.jpg")
    assert parse("missing.jpg,dog\na.jpg,cat\n").paths == ("missing.jpg", "a.jpg")


def test_labels_of_several_words_need_commas():
    with pytest.raises(DataError, match=r"line 1: several words behind a\.jpg; separate the columns by commas"):
        parse("a.jpg golden retriever\nb.jpg cat\n")
    assert parse("a.jpg,golden retriever\nb.jpg,cat\n").labels == ("golden retriever", "cat")


def test_quotes_protect_separators():
    assert parse('"a,b.jpg","x ""y"""\n').paths == ("a,b.jpg",)
    assert parse('"a,b.jpg","x ""y"""\n').labels == ('x "y"',)


def test_names_that_are_not_utf_8_are_those_of_the_files():
    name = b"\xe9.jpg".decode("utf-8", "surrogateescape")
    assert parse(f"{name},1").paths == (name,)


def test_all_problems_are_told_at_once_and_the_rest_counted():
    lines = ["a.jpg,1", "b.jpg", "c.jpg,", ",2", "./a.jpg,2", "d.jpg,1,2", "e.jpg,1", "e.jpg,1", '"f.jpg,1']
    with pytest.raises(DataError) as caught:
        parse("\n".join(lines))
    message = str(caught.value)
    assert message.startswith("labels: line 2: expected a path and a label in 2 columns, got 'b.jpg'; line 3: ")
    assert "line 5: a.jpg is there already, on line 1; line 6: " in message
    assert message.endswith("got 'd.jpg,1,2'; and 2 more")


@pytest.mark.parametrize("text", ["", "\n \n", "path,label\n"])
def test_a_list_without_labels_is_refused(text):
    with pytest.raises(DataError, match="labels: holds no labels"):
        parse(text)


@pytest.mark.parametrize(
    ("labels", "numbers", "classes"),
    [
        (("2", "0", "1", "2"), [2, 0, 1, 2], ("0", "1", "2")),
        (("1", "-1", "0"), [1, -1, 0], ("0", "1")),
        (("10", "7", "-1", "10"), [1, 0, -1, 1], ("7", "10")),
        (("dog", "cat", "dog"), [1, 0, 1], ("cat", "dog")),
        (("1", "cat", "01"), [1, 2, 0], ("01", "1", "cat")),
        (("dog", "-1", "cat"), [1, -1, 0], ("cat", "dog")),
    ],
)
def test_labels_are_numbered(labels, numbers, classes):
    got, names, notes = number_labels(labels)
    assert (got.tolist(), names, got.dtype) == (numbers, classes, np.int64)
    assert bool(notes) == (classes == ("7", "10"))


def listing(*names):
    return Listing(names=names, read=lambda i: b"", stamp=lambda i: (0, 0), ignored={})


@pytest.mark.parametrize(
    "paths",
    [
        ("top/a.jpg", "top/b/c.png"),
        ("a.jpg", "b/c.png"),
        ("top/a", "b/c"),
        ("data/set/top/a.jpg", "data/set/top/b/c.png"),
    ],
)
def test_listed_files_are_found_from_the_top_or_below_it_or_by_an_absolute_path(paths):
    found = find_listed(listing("top/a.jpg", "top/b/c.png"), LabelList("", paths, ("", "")), "/data/set")
    assert found.tolist() == [0, 1]


def test_files_that_are_not_there_are_not_found_elsewhere():
    found = find_listed(listing("one/a.jpg", "two/a.jpg"), LabelList("", ("a.jpg", "two/a.jpg"), ("", "")), "/data")
    assert found.tolist() == [-1, 1]


def test_a_name_without_its_suffix_that_two_files_have_is_refused():
    files = listing("a.jpg", "a.png", "b.png")
    with pytest.raises(DataError, match=r"labels: a may be a\.jpg and a\.png; write the suffixes too"):
        find_listed(files, LabelList("labels", ("b", "a"), ("", "")), "/data")
    assert find_listed(files, LabelList("labels", ("b", "a.png"), ("", "")), "/data").tolist() == [2, 1]
