/* What the published bindings take from TensorRT's libraries when they are imported. None of it is ever called:
   with these names present, the bindings' classes and enums can be looked at without the libraries. */
#define NAME(symbol) void *symbol(void) { return 0; }
NAME(createInferBuilder_INTERNAL)
NAME(createInferRefitter_INTERNAL)
NAME(createInferRuntime_INTERNAL)
NAME(createNvOnnxParserRefitter_INTERNAL)
NAME(createNvOnnxParser_INTERNAL)
NAME(getBuilderPluginRegistry)
NAME(getNvOnnxParserVersion)
NAME(getPluginRegistry)
NAME(initLibNvInferPlugins)
/* 8.6: nvuffparser::createUffParser(), FieldMap's constructor, nvcaffeparser1's two functions */
NAME(_ZN11nvuffparser15createUffParserEv)
NAME(_ZN11nvuffparser8FieldMapC1EPKcPKvNS_9FieldTypeEi)
NAME(_ZN14nvcaffeparser117createCaffeParserEv)
NAME(_ZN14nvcaffeparser123shutdownProtobufLibraryEv)
