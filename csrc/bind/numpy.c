/* whisperkv._numpy: the CPU kernels on NumPy arrays, for notebooks and tests. Every argument is checked here. */
#include "module.h"
#define NPY_NO_DEPRECATED_API NPY_2_0_API_VERSION
#define NPY_TARGET_VERSION NPY_1_23_API_VERSION
#include <math.h>
#include <numpy/arrayobject.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../whisperkv.h"
#include "memory.h"

enum {
  ANY = -1,    /* a size that is not known before the array is seen */
  STORAGE = -1 /* any dtype that a cache may have */
};

static const struct wkv_cpu_kernels *kernels;

/* ---- arguments ---- */

struct expected {
  int ndim;
  npy_intp shape[4]; /* ANY is filled in */
  int type;          /* NumPy's number of the dtype, or STORAGE */
  int flags;         /* NPY_ARRAY_CARRAY_RO, NPY_ARRAY_CARRAY if written to, 0 if its data is not read */
};

static void write_shape(char *text, size_t room, const int ndim, const npy_intp *const shape) {
  for (int i = 0; i < ndim; i++) {
    const char *const comma = i ? ", " : "";
    const int n = shape[i] == ANY ? snprintf(text, room, "%sany", comma)
                                  : snprintf(text, room, "%s%lld", comma, (long long)shape[i]);
    if (n < 0 || (size_t)n >= room) return;
    text += n;
    room -= (size_t)n;
  }
}

static bool has_shape(PyArrayObject *const array, struct expected *const want) {
  if (PyArray_NDIM(array) != want->ndim) return false;
  for (int i = 0; i < want->ndim; i++) {
    const npy_intp size = PyArray_DIM(array, i);
    if (size < 1 || (want->shape[i] != ANY && want->shape[i] != size)) return false;
  }
  memcpy(want->shape, PyArray_DIMS(array), (size_t)want->ndim * sizeof want->shape[0]);
  return true;
}

static const char *type_name(const int type) {
  return type == NPY_FLOAT32   ? "float32"
         : type == NPY_FLOAT16 ? "float16"
         : type == NPY_INT32   ? "int32"
                               : "float32 or float16";
}

/* The data of an array argument, or NULL with an exception that names the argument. */
static void *data_of(const char *const name, PyObject *const object, struct expected *const want) {
  if (!PyArray_Check(object))
    return PyErr_Format(PyExc_TypeError, "%s must be a NumPy array, not %R", name, (PyObject *)Py_TYPE(object));
  PyArrayObject *const array = (PyArrayObject *)object;
  const int type = PyArray_TYPE(array);
  const bool right_type = want->type == STORAGE ? type == NPY_FLOAT32 || type == NPY_FLOAT16 : type == want->type;
  if (!right_type || PyArray_ISBYTESWAPPED(array))
    return PyErr_Format(PyExc_TypeError, "%s must be %s, not %S", name, type_name(want->type),
                        (PyObject *)PyArray_DESCR(array));
  want->type = type;
  if (!has_shape(array, want)) {
    char given[256] = "", allowed[256] = "";
    write_shape(given, sizeof given, PyArray_NDIM(array), PyArray_DIMS(array));
    write_shape(allowed, sizeof allowed, want->ndim, want->shape);
    return PyErr_Format(PyExc_ValueError, "%s must have shape [%s] and no empty side, not [%s]", name, allowed, given);
  }
  if (numbers_in(want->shape, want->ndim) > MOST_NUMBERS)
    return PyErr_Format(PyExc_ValueError, "%s must have 2^48 numbers at most, and its sides have more", name);
  if (!PyArray_CHKFLAGS(array, want->flags & ~NPY_ARRAY_WRITEABLE))
    return PyErr_Format(PyExc_ValueError, "%s must be C-contiguous and aligned, not strided or shifted", name);
  if (!PyArray_CHKFLAGS(array, want->flags))
    return PyErr_Format(PyExc_ValueError, "%s must be writable, not read-only: it is changed in place", name);
  return PyArray_DATA(array);
}

struct array {
  const char *name;
  PyObject *object; /* NULL if it is not read */
  bool is_written;
};

static struct memory memory_of(const struct array *const array) {
  PyArrayObject *const object = (PyArrayObject *)array->object;
  return object ? (struct memory){PyArray_DATA(object), (size_t)PyArray_NBYTES(object)} : (struct memory){NULL, 0};
}

/* Those that are written share memory with no other. */
static bool are_apart(const struct array *const arrays, const int count) {
  for (int i = 0; i < count; i++)
    for (int j = 0; arrays[i].is_written && j < count; j++)
      if (i != j && overlap(memory_of(&arrays[i]), memory_of(&arrays[j])))
        return PyErr_Format(PyExc_ValueError,
                            "%s must have memory of its own, as it is written to, and shares some with %s",
                            arrays[i].name, arrays[j].name);
  return true;
}

static bool read_float(const char *const name, PyObject *const object, float *const number) {
  const double value = PyFloat_AsDouble(object);
  if (PyErr_Occurred()) PyErr_Format(PyExc_TypeError, "%s must be a number, not %R", name, object);
  else if (!isfinite((float)value)) PyErr_Format(PyExc_ValueError, "%s must be finite, not %R", name, object);
  *number = (float)value;
  return !PyErr_Occurred();
}

static bool read_count(const char *const name, PyObject *const object, int64_t *const count) {
  *count = PyLong_AsLongLong(object);
  if (PyErr_Occurred()) PyErr_Format(PyExc_TypeError, "%s must be an integer, not %R", name, object);
  else if (*count < 1 || *count > INT32_MAX)
    PyErr_Format(PyExc_ValueError, "%s must be in 1..%d, not %R", name, INT32_MAX, object);
  return !PyErr_Occurred();
}

static bool read_policy(PyObject *const object, int *const policy) {
  const long number = PyLong_AsLong(object);
  if (PyErr_Occurred()) PyErr_Format(PyExc_TypeError, "policy must be an integer, not %R", object);
  else if (number < 0 || number >= POLICIES)
    PyErr_Format(PyExc_ValueError, "policy must be in 0..%d, a place in POLICIES, not %R", POLICIES - 1, object);
  *policy = (int)number;
  return !PyErr_Occurred();
}

static bool is_sound(const int32_t *const cursor, const int64_t rows, const int64_t tokens, const int64_t slots) {
  char error[256];
  const char *const wrong = wkv_check_cursor(cursor, rows, tokens, slots, error, sizeof error);
  if (wrong) PyErr_SetString(PyExc_ValueError, wrong);
  return !wrong;
}

/* ---- functions ---- */

static PyObject *compact_attention(PyObject *const module, PyObject *const args, PyObject *const keywords) {
  (void)module;
  static char *names[] = {"query", "key", "value", "keys", "values", "cursor", "scale", "want_weights", NULL};
  PyObject *query, *key, *value, *keys, *values, *cursor, *scale, *want_weights;
  if (!PyArg_ParseTupleAndKeywords(args, keywords, "OOOOOOOO:compact_attention", names, &query, &key, &value, &keys,
                                   &values, &cursor, &scale, &want_weights))
    return NULL;

  struct expected tokens = {4, {ANY, ANY, ANY, ANY}, STORAGE, NPY_ARRAY_CARRAY_RO}; /* [rows, tokens, heads, dim] */
  struct wkv_attention a = {.query = data_of("query", query, &tokens)};
  if (!a.query) return NULL;
  a.rows = tokens.shape[0], a.tokens = tokens.shape[1], a.heads = tokens.shape[2], a.head_dim = tokens.shape[3];
  a.kv_heads = a.heads;
  a.dtype = tokens.type == NPY_FLOAT32 ? WKV_FLOAT32 : WKV_FLOAT16;
  struct expected cache = {4, {a.rows, a.heads, ANY, a.head_dim}, tokens.type, NPY_ARRAY_CARRAY};
  struct expected places = {2, {WKV_CURSORS, a.rows}, NPY_INT32, NPY_ARRAY_CARRAY_RO};
  if (!(a.key = data_of("key", key, &tokens)) || !(a.value = data_of("value", value, &tokens)) ||
      !(a.keys = data_of("keys", keys, &cache)) || !(a.values = data_of("values", values, &cache)) ||
      !(a.cursor = data_of("cursor", cursor, &places)) || !read_float("scale", scale, &a.scale))
    return NULL;
  a.slots = cache.shape[2];
  const struct array all[] = {{"query", query, false}, {"key", key, false},      {"value", value, false},
                              {"keys", keys, true},    {"values", values, true}, {"cursor", cursor, false}};
  const int wanted = PyObject_IsTrue(want_weights);
  if (wanted < 0 || !are_apart(all, sizeof all / sizeof all[0]) || !is_sound(a.cursor, a.rows, a.tokens, a.slots))
    return NULL;

  npy_intp none = 0, weights_shape[] = {a.rows, a.heads, a.tokens, a.slots};
  PyObject *const output = PyArray_SimpleNew(4, tokens.shape, tokens.type);
  PyObject *const weights = wanted ? PyArray_SimpleNew(4, weights_shape, NPY_FLOAT32)
                                   : PyArray_SimpleNew(1, &none, NPY_FLOAT32);
  if (output && weights) {
    a.output = PyArray_DATA((PyArrayObject *)output);
    a.weights = wanted ? PyArray_DATA((PyArrayObject *)weights) : NULL;
    Py_BEGIN_ALLOW_THREADS
    kernels->compact_attention(&a, 0, a.rows * a.heads);
    Py_END_ALLOW_THREADS
  }
  PyObject *const both = output && weights ? PyTuple_Pack(2, output, weights) : NULL;
  Py_XDECREF(output);
  Py_XDECREF(weights);
  return both;
}

static PyObject *score_evict(PyObject *const module, PyObject *const args, PyObject *const keywords) {
  (void)module;
  static char *names[] = {"weights", "keys",   "cursor", "positions", "scores",
                          "policy",  "budget", "recent", "decay",     NULL};
  PyObject *weights, *keys, *cursor, *positions, *scores, *policy, *budget, *recent, *decay;
  if (!PyArg_ParseTupleAndKeywords(args, keywords, "OOOOOOOOO:score_evict", names, &weights, &keys, &cursor, &positions,
                                   &scores, &policy, &budget, &recent, &decay))
    return NULL;

  struct wkv_eviction e = {0};
  if (!read_policy(policy, &e.policy) || !read_count("budget", budget, &e.budget) ||
      !read_count("recent", recent, &e.recent) || !read_float("decay", decay, &e.decay))
    return NULL;
  /* What the policy does not read only lends its shape, so it may be np.broadcast_to(0, shape). */
  const int attention_flags = policies[e.policy].reads_attention ? NPY_ARRAY_CARRAY_RO : 0;
  const int key_flags = policies[e.policy].reads_key_norm ? NPY_ARRAY_CARRAY_RO : 0;
  struct expected attention = {4, {ANY, ANY, ANY, ANY}, NPY_FLOAT32, attention_flags};
  if (!(e.weights = data_of("weights", weights, &attention))) return NULL;
  e.rows = attention.shape[0], e.heads = attention.shape[1], e.tokens = attention.shape[2];
  e.slots = attention.shape[3];
  struct expected cache = {4, {e.rows, e.heads, e.slots, ANY}, STORAGE, key_flags};
  struct expected places = {2, {WKV_CURSORS, e.rows}, NPY_INT32, NPY_ARRAY_CARRAY};
  struct expected integers = {2, {e.rows, e.slots}, NPY_INT32, NPY_ARRAY_CARRAY};
  struct expected floats = {2, {e.rows, e.slots}, NPY_FLOAT32, NPY_ARRAY_CARRAY};
  if (!(e.keys = data_of("keys", keys, &cache)) || !(e.cursor = data_of("cursor", cursor, &places)) ||
      !(e.positions = data_of("positions", positions, &integers)) || !(e.scores = data_of("scores", scores, &floats)))
    return NULL;
  e.head_dim = cache.shape[3];
  e.dtype = cache.type == NPY_FLOAT32 ? WKV_FLOAT32 : WKV_FLOAT16;
  /* Several tokens were appended one after another, so none of them may have called for an eviction. */
  const int64_t room = e.tokens > 1 && e.budget < e.slots ? e.budget : e.slots;
  const struct array all[] = {{"weights", attention_flags ? weights : NULL, false},
                              {"keys", key_flags ? keys : NULL, false},
                              {"cursor", cursor, true},
                              {"positions", positions, true},
                              {"scores", scores, true}};
  if (!are_apart(all, sizeof all / sizeof all[0]) || !is_sound(e.cursor, e.rows, e.tokens, room)) return NULL;

  Py_BEGIN_ALLOW_THREADS
  kernels->score_evict(&e, 0, e.rows);
  Py_END_ALLOW_THREADS
  Py_RETURN_NONE;
}

/* ---- module ---- */

PyDoc_STRVAR(compact_attention_doc,
             "compact_attention(query, key, value, keys, values, cursor, scale, want_weights) -> (output, weights)\n\n"
             "New tokens enter the cache and attend over its live slots; keys and values are changed in place.\n"
             "query, key, value and output [rows, tokens, heads, dim], keys and values [rows, heads, slots, dim], all\n"
             "float32 or all float16; cursor int32 [4, rows]: live, slot, seen, pinned; weights float32\n"
             "[rows, heads, tokens, slots], or empty if not wanted.");
PyDoc_STRVAR(score_evict_doc,
             "score_evict(weights, keys, cursor, positions, scores, policy, budget, recent, decay)\n\n"
             "Move the cache on by the tokens that compact_attention wrote: score every live slot and choose the slot\n"
             "of the next token; cursor, positions int32 and scores float32 [rows, slots] are changed in place.\n"
             "policy is a place in POLICIES.");

#define FUNCTION(name) {#name, (PyCFunction)(void (*)(void))name, METH_VARARGS | METH_KEYWORDS, name##_doc}
static PyMethodDef methods[] = {FUNCTION(compact_attention), FUNCTION(score_evict), {NULL, NULL, 0, NULL}};

static int start(PyObject *const module) {
  char error[256];
  kernels = wkv_cpu_select(getenv("WHISPERKV_ISA"), error, sizeof error);
  if (!kernels) {
    PyErr_Format(PyExc_ImportError, "environment variable WHISPERKV_ISA: %s", error);
    return -1;
  }
  if (PyArray_ImportNumPyAPI() < 0) return -1;
  return add_constants(module, kernels->isa) ? 0 : -1;
}

static PyModuleDef_Slot module_slots[] = {{Py_mod_exec, (void *)start}, {0, NULL}};
static struct PyModuleDef definition = {
    .m_base = PyModuleDef_HEAD_INIT,
    .m_name = "whisperkv._numpy",
    .m_doc =
        "The CPU kernels on NumPy arrays. POLICIES lists (name, reads attention, reads key norm) by number; ISA is "
        "the instruction set in use.",
    .m_methods = methods,
    .m_slots = module_slots};

PyMODINIT_FUNC PyInit__numpy(void) { return PyModuleDef_Init(&definition); }
