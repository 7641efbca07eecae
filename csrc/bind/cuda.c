/* whisperkv._cuda: registers the kernels of the torch ops for CUDA. Imported where CUDA works, after _torch. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "../whisperkv.h"
#include "torch_ops.h"

static PyObject *register_kernels(PyObject *const module, PyObject *const paths) {
  static bool registered; /* once in a process, however often the module is imported */
  (void)module;
  if (registered) Py_RETURN_NONE;
  PyObject *cpu, *cuda;
  if (!PyArg_ParseTuple(paths, "O&O&", PyUnicode_FSConverter, &cpu, PyUnicode_FSConverter, &cuda)) return NULL;
  char error[1024];
  const char *reason = torch_shim_load(PyBytes_AsString(cpu), error, sizeof error);
  if (!reason) reason = torch_shim_load_cuda(PyBytes_AsString(cuda), error, sizeof error);
  Py_DECREF(cpu);
  Py_DECREF(cuda);
  if (reason) return PyErr_Format(PyExc_ImportError, "%s", reason);
  const char *const failed = torch_ops_register(false);
  if (failed) return PyErr_Format(PyExc_ImportError, "torch refused the CUDA ops of whisperkv: %s failed", failed);
  registered = true;
  Py_RETURN_NONE;
}

static PyObject *probe(PyObject *const module, PyObject *const nothing) {
  (void)module, (void)nothing;
  const char *const wrong = wkv_cuda_probe();
  return PyUnicode_FromString(wrong ? wrong : "");
}

static PyMethodDef methods[] = {
    {"register", register_kernels, METH_VARARGS,
     "register(path of libtorch_cpu, path of libtorch_cuda): the ops of "
     "torch.ops.whisperkv work on CUDA tensors from then on."},
    {"probe", probe, METH_NOARGS, "probe(): \"\" if the kernels run on the current device, else what CUDA says."},
    {NULL, NULL, 0, NULL}};
static PyModuleDef_Slot slots[] = {{0, NULL}};
static struct PyModuleDef definition = {.m_base = PyModuleDef_HEAD_INIT,
                                        .m_name = "whisperkv._cuda",
                                        .m_doc = "The torch ops on CUDA.",
                                        .m_methods = methods,
                                        .m_slots = slots};

PyMODINIT_FUNC PyInit__cuda(void) { return PyModuleDef_Init(&definition); }
