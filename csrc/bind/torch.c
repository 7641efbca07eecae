/* whisperkv._torch: registers the torch ops. */
#include "module.h"
#include "torch_device.h"
#include "torch_ops.h"

static PyObject *register_ops(PyObject *const module, PyObject *const path) {
  static bool registered; /* once in a process, however often the module is imported */
  (void)module;
  if (registered) Py_RETURN_NONE;
  PyObject *const bytes = PyUnicode_EncodeFSDefault(path);
  if (!bytes) return NULL;
  char error[1024];
  const char *const reason = torch_shim_load(PyBytes_AsString(bytes), error, sizeof error);
  Py_DECREF(bytes);
  if (reason) return PyErr_Format(PyExc_ImportError, "%s", reason);
  const char *const failed = torch_ops_register(true);
  if (failed) return PyErr_Format(PyExc_ImportError, "torch refused the ops of whisperkv: %s failed", failed);
  registered = true;
  Py_RETURN_NONE;
}

static int start(PyObject *const module) {
  char error[256];
  const char *const isa = device_start(error, sizeof error);
  if (!isa) {
    PyErr_Format(PyExc_ImportError, "environment variable WHISPERKV_ISA: %s", error);
    return -1;
  }
  return add_constants(module, isa) ? 0 : -1;
}

static PyMethodDef methods[] = {
    {"register", register_ops, METH_O, "register(path of libtorch_cpu): adds the ops to torch.ops.whisperkv."},
    {NULL, NULL, 0, NULL}};
static PyModuleDef_Slot slots[] = {{Py_mod_exec, (void *)start}, {0, NULL}};
static struct PyModuleDef definition = {
    .m_base = PyModuleDef_HEAD_INIT,
    .m_name = "whisperkv._torch",
    .m_doc =
        "The torch ops. POLICIES lists (name, reads attention, reads key norm) by number; ISA is the instruction "
        "set in use.",
    .m_methods = methods,
    .m_slots = slots};

PyMODINIT_FUNC PyInit__torch(void) { return PyModuleDef_Init(&definition); }
