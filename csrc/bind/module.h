/* What both modules offer to Python. */
#ifndef WHISPERKV_MODULE_H
#define WHISPERKV_MODULE_H
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "policy_table.h"

static inline bool add(PyObject *const module, const char *const name, PyObject *const value) {
  const bool added = value && !PyModule_AddObjectRef(module, name, value);
  Py_XDECREF(value);
  return added;
}

/* ISA and POLICIES: ((name, reads attention, reads key norm), ...). */
static inline bool add_constants(PyObject *const module, const char *const isa) {
  PyObject *const all = PyTuple_New(POLICIES);
  for (int i = 0; all && i < POLICIES; i++)
    PyTuple_SetItem(all, i,
                    Py_BuildValue("(sNN)", policies[i].name, PyBool_FromLong(policies[i].reads_attention),
                                  PyBool_FromLong(policies[i].reads_key_norm)));
  return add(module, "ISA", PyUnicode_FromString(isa)) && add(module, "POLICIES", all);
}

#endif
