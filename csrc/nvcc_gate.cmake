# Compiles every kernel for each GPU architecture and prints what it needs. Fails on spills and on local-memory stack
# frames: both mean that values meant for registers travel through memory. No kernel is excused so far.
# Usage: cmake -DNVCC=... -DCSRC=... -DOUT=... -P nvcc_gate.cmake
file(MAKE_DIRECTORY ${OUT})
file(GLOB kernels ${CSRC}/kernels/*.cu)
set(failed "")
foreach(kernel ${kernels})
  get_filename_component(name ${kernel} NAME_WE)
  foreach(arch 80 90a 100)
    execute_process(
      COMMAND ${NVCC} -std=c++20 -O3 -I${CSRC} -gencode=arch=compute_${arch},code=sm_${arch} -Xptxas -v -c ${kernel} -o
              ${OUT}/${name}_sm_${arch}.o
      RESULT_VARIABLE status OUTPUT_VARIABLE report ERROR_VARIABLE report)
    if(NOT status EQUAL 0)
      message(FATAL_ERROR "${name} does not compile for sm_${arch}:\n${report}")
    endif()
    string(REGEX MATCHALL "Used [0-9]+ registers" registers "${report}")
    list(REMOVE_DUPLICATES registers)
    string(REPLACE "Used " "" registers "${registers}")
    string(REPLACE " registers" "" registers "${registers}")
    string(REGEX MATCHALL "[0-9]+ bytes smem" static_shared "${report}")
    list(REMOVE_DUPLICATES static_shared)
    message("${name} sm_${arch}: registers [${registers}], static shared memory [${static_shared}]")
    if(report MATCHES "[1-9][0-9]* bytes stack frame|[1-9][0-9]* bytes spill")
      list(APPEND failed "${name} sm_${arch}")
      message("${report}")
    endif()
  endforeach()
endforeach()
if(failed)
  message(FATAL_ERROR "spills or stack frames in: ${failed}")
endif()
