// The Python module `pegasus_step`, which says what the build holds. Importing it registers the
// ops. Written without pybind11, which would take as long to compile as all of the kernels.
#include <Python.h>

#include "../reparam/levels.h"
#include "kernels.h"

namespace pegasus {

const NormKernels& norm_kernels() {
  static const NormKernels& best = choose<NormKernels>(PEGASUS_ALL_LEVELS(norm_kernels));
  return best;
}

const TileKernels& tile_kernels() {
  static const TileKernels& best = choose<TileKernels>(PEGASUS_ALL_LEVELS(tile_kernels));
  return best;
}

}  // namespace pegasus

PyMODINIT_FUNC PyInit_pegasus_step() {
  static PyModuleDef definition = {
      .m_base = PyModuleDef_HEAD_INIT,
      .m_name = "pegasus_step",
      .m_doc = "Kernels of a training step; importing it registers torch.ops.pegasus_step.",
      .m_size = -1,
  };
  try {
    PyObject* module = PyModule_Create(&definition);
    if (module) PyModule_AddStringConstant(module, "simd_level", pegasus::norm_kernels().level);
    return module;
  } catch (const std::exception& error) {  // PEGASUS_SIMD names a level that can't be had
    PyErr_SetString(PyExc_ImportError, error.what());
    return nullptr;
  }
}
